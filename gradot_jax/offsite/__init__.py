"""The two parties: what the owner ships, what the data owner trains, how it comes back."""
