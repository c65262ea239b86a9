"""Self-contained HTML reports: pages, tables and curves, from finished numbers."""
