"""What ``nautile bench kernels`` measures, and how: cases, timing, and the roofline of the machine in the same run."""
