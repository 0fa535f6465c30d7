"""Passes of a model over calibration text: its Kronecker factors, how true its gradients are."""
