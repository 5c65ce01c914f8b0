//! (pci)
