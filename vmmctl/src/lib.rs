//! Shows and changes what the hypervisor knows of a virtual machine
