//! Loads a guest kernel into a named virtual machine, without /dev/kvm
