"""The specification of every op: plain torch, written for reading, differentiated by autograd, on any device."""
