"""All that is not the method: settings, files, checkpoints, evaluation, figures, the report."""
