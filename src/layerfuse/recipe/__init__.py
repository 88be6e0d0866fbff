"""An experiment as a YAML file, validated before anything runs."""
