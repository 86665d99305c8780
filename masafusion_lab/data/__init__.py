"""Cases: what there is to edit."""
