"""Official names over our ops: code written for DeepSeek's own libraries runs on what is here, on a CPU, too."""
