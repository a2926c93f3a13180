"""The published methods: AttnDistill, head-specific KD, SSTA and Attention Probe, and what they share."""
