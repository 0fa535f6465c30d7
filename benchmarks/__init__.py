"""Times, memory and fractions of the machine's floor for each phase of offsite-tuning."""
