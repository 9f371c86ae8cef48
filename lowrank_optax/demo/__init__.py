"""What the command line shows: tasks, training runs, spectra. Nothing else imports it."""
