"""One file per stage of the pipeline: glue, no arithmetic."""
