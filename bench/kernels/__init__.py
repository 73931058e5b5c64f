"""What the compilers say of every GPU kernel."""
