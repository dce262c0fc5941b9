"""Joint checkpoints of all branches, and the files of Megatron's distributed format.

    run_dir/checkpoints/step_000004/
        text/   __0_0.distcp __1_0.distcp .metadata metadata.json    Megatron's distributed format
                loop.json                                            data positions, counters, table so far
                asked.bin                                            open questions to teachers, if any
        image/  ...
        manifest.json                                                written last

A checkpoint is valid if its manifest is there and every file has the size and the SHA-256 that the manifest
says. The manifest is renamed into place after every branch has reported that its files are on the disk, so a
run that dies at any instant leaves a valid checkpoint or a folder without a manifest, which is ignored.

``manifest``        what a checkpoint holds, which are valid, which to delete (neither torch nor Megatron)
``stop``            signals and the wall-clock limit
``actor_state``     one actor as Megatron's sharded state dict, and back, at any layout
``files``           how a rank writes its file: hashed on the way, in the loop's thread or in another
``joint``           saving and loading over all branches
``distcp``          the files of ``torch.distributed.checkpoint``, written and read
``safe_pickle``     pickles from strangers, read without running anything
``compatible``      whether a configuration may continue a checkpoint
``compare``         whether two runs are the same, bit for bit
"""
