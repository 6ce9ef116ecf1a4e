"""Parts that the commands of ``deploykit/cli`` and of the tasks share: options, results, errors, progress."""
