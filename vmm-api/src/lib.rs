//! The named VM object and the only crate that knows KVM: libvmmapi's place in rhyve
