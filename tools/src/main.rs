//! `offshoot`: the administrator's command line.
mod image;

fn main() {}
