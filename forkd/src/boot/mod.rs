//! How a guest is started.

pub mod acpi;
pub mod linux;
mod processor;
