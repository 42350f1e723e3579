"""Where documents come from: one file per source, all behind the same two methods."""
