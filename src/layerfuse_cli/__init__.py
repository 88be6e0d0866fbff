"""The command line of layerfuse, beside the package that it calls.

Importing anything of `layerfuse` imports torch and transformers, which takes seconds. Nothing here
does so before a verb runs: help and wrong usage are answered at once.
"""
