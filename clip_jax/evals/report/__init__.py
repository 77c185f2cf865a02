"""Reports: tables, charts, HTML."""
