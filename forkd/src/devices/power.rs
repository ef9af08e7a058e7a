//! The power device: how a guest turns its machine off or resets it.
//!
//! Three ports, announced by the ACPI tables (`crate::boot::acpi`): sleep control, sleep status and
//! reset. Kernels without ACPI reset by the keyboard controller; of that only the one command is
//! there.

use std::sync::Arc;

use super::bus::PioDevice;
use crate::wires::PowerSwitch;

/// What is written to the reset register to reset.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of "off", as the `_S5` object says.
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLEEP_CONTROL: u16 = 0;
const RESET: u16 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;
/// The keyboard controller's command that pulls the reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// The three ports.
pub(super) struct Power(pub(super) Arc<dyn PowerSwitch>);

impl PioDevice for Power {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, [value, ..]) if *value == SLEEP_ENABLE | SLEEP_TYPE_OFF << 2 => {
                self.0.power_off();
            }
            (RESET, [RESET_VALUE, ..]) => self.0.reset(),
            _ => {}
        }
    }
}

/// The keyboard controller's command port.
pub(super) struct KeyboardReset(pub(super) Arc<dyn PowerSwitch>);

impl PioDevice for KeyboardReset {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        // Never busy: a kernel waits for that before it gives the command.
        data.fill(0);
    }

    fn write(&mut self, _offset: u16, data: &[u8]) {
        if data == [KEYBOARD_RESET] {
            self.0.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32, AtomicU32);

    impl PowerSwitch for Count {
        fn power_off(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn reset(&self) {
            self.1.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn only_the_documented_values_end_a_machine() {
        let count = Arc::new(Count::default());
        let (mut power, mut keyboard) = (Power(count.clone()), KeyboardReset(count.clone()));
        for value in 0..=255u8 {
            (0..3).for_each(|offset| power.write(offset, &[value]));
            keyboard.write(0, &[value]);
        }
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(count.1.load(Ordering::Relaxed), 2);
    }
}
