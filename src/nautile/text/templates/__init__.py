"""Chat templates of the published models, for folders that come without their own: one file per format."""
