"""Other formats become ours, and ours theirs: the only room where pickles may be read."""
