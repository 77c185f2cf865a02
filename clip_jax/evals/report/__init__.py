"""Reports of training and evaluation runs: JSON, HTML, tables, charts."""
