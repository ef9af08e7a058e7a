//! Disks that blockd serves in guest memory (`direct`): what a guest reads and writes is right,
//! whatever happens to blockd, the driver and the machine; a machine that is forked goes on without
//! it, and nothing else ever takes its place unasked.

mod devices;
mod machines;
