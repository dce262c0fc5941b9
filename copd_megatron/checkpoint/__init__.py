"""Joint checkpoints of all branches, and Megatron's distributed format read and written outside a job.

    run_dir/checkpoints/step_000004/
        text/   __0_0.distcp __1_0.distcp .metadata metadata.json    Megatron's distributed format
                loop.json                                            data positions, counters, table so far
        image/  ...
        manifest.json                                                written last

A checkpoint is valid if its manifest is there and every file has the size and the SHA-256 that the manifest
says. The manifest is renamed into place after every branch has reported that its files are on the disk, so a
run that dies at any instant leaves a valid checkpoint or a folder without a manifest, which nobody reads.

``manifest``        what a checkpoint holds, which are valid, which to delete (neither torch nor Megatron)
``lock``            one job per run directory
``stop``            signals and the wall-clock limit
``actor_state``     one actor as Megatron's sharded state dict, and back, at any layout
``files``           how a rank writes its file: hashed on the way, in the loop's thread or in another
``joint``           saving and loading over all branches
``hf_names``        Hugging Face tensors inside Megatron's stacked and fused ones
``folder``          a branch's folder as a source of Hugging Face tensors, without a job
``convert``         Hugging Face to Megatron and back, tensor by tensor
"""
