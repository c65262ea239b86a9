"""Recipe: YAML and `key=value` overrides -> checked settings of a run."""
