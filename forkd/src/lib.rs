//! Virtual machines that fork while they run.
//!
//! One process holds one VM. Its memory is a stack of sealed layers and one writable top, its disks
//! are blockd's, and a fork takes memory, processors, devices and disks at one instant.

pub mod api;
pub mod boot;
pub mod daemon;
pub mod devices;
pub mod http;
mod identity;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod process;
pub mod snapshot;
pub mod tap;
pub mod wires;
