"""Hugging Face folders: the only room that knows safetensors files and the files beside them.

``folder``        the tensors of a folder, read by range, by slice, and expert by expert
``header``        safetensors headers, checked and made
``planned_file``  files written in place, block by block, from any thread
``tensors``       a tensor known by name, and the blocks that it is handled in
``dtypes``        the one table of types
``template``      how tensors lie in a folder's files, so that a conversion can give the same files back
``companions``    index, tokenizer and the other files beside the tensors
``model_config``  the model that config.json describes
``appear``        folders that get their name when they are complete

``companions``, ``model_config`` and ``appear`` import no torch.
"""
