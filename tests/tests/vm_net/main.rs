//! Network cards of machines: frames pass in both directions; a child is another station, on an
//! interface of its own, and is not heard before it knows who it is.

mod device;
mod machines;
