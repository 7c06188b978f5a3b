"""What is measured of the backbone, the control and each P: losses, speed, cache size."""
