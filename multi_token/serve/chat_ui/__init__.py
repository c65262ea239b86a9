"""Chat page in the browser: static files, facts about the run, examples and the report."""
