"""A small trained OPT with texts and tasks on which offsite-tuning means something."""
