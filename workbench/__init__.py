"""Studies: from a claim in a YAML file to a verdict."""
