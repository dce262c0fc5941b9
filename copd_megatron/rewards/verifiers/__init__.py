"""The built-in verifiers, one file each, found by file name. Importing one imports nothing slow."""
