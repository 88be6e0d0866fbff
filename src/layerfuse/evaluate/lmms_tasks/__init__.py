"""Tasks for lmms-eval that it lacks, from files as their authors publish them."""
