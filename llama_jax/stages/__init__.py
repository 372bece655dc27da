"""The stages of the paper, one file each; stages do not import each other."""
