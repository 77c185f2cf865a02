"""Where pairs come from: each module makes a DataSource, some of them evaluation sets too."""
