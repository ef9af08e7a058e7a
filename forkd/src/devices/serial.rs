//! The serial port that is the guest's console (COM1, a 16550A).
//!
//! Nothing here waits or fails towards the guest: output goes to the bounded buffer of
//! [`super::console`], and an interrupt that cannot be raised is an interrupt of a machine that is
//! going away.

use std::io::{self, Write};
use std::sync::Arc;

use format::{Error, Result};
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};

use super::bus::PioDevice;
use super::console::Output;
use crate::wires::Interrupt;

/// The interrupt line.
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = Error;

    fn trigger(&self) -> Result<()> {
        self.0.raise()
    }
}

/// Where printed bytes go.
struct Printer(Arc<Output>);

impl Write for Printer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|b| self.0.put(*b));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Wakes the console when the guest has room for more typed bytes.
struct Room(Arc<Output>);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.wake();
    }
}

/// The port.
pub(super) struct SerialPort {
    serial: Serial<Line, Room, Printer>,
    interrupt: Arc<dyn Interrupt>,
    output: Arc<Output>,
}

/// Its registers and the bytes that the guest has not read.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PortState {
    divisor: (u8, u8),
    interrupt_enable: u8,
    interrupt_identification: u8,
    line: (u8, u8),
    modem: (u8, u8),
    scratch: u8,
    input: Vec<u8>,
}

impl SerialPort {
    pub(super) fn new(interrupt: Arc<dyn Interrupt>, output: Arc<Output>) -> SerialPort {
        let parts = (Line(interrupt.clone()), Room(output.clone()), Printer(output.clone()));
        let serial = Serial::with_events(parts.0, parts.1, parts.2);
        SerialPort { serial, interrupt, output }
    }

    /// Takes typed bytes; returns how many had room.
    pub(super) fn typed(&mut self, bytes: &[u8]) -> usize {
        let room = self.serial.fifo_capacity().min(bytes.len());
        // Fails for a full FIFO, of which we know, and when the interrupt is not raised: the bytes
        // are in the FIFO then.
        self.serial.enqueue_raw_bytes(&bytes[..room]).unwrap_or(room)
    }

    pub(super) fn save(&self) -> PortState {
        let s = self.serial.state();
        PortState {
            divisor: (s.baud_divisor_low, s.baud_divisor_high),
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line: (s.line_control, s.line_status),
            modem: (s.modem_control, s.modem_status),
            scratch: s.scratch,
            input: s.in_buffer,
        }
    }

    /// Goes on where another port was saved; interrupts that were pending are raised again.
    pub(super) fn restore(&mut self, state: &PortState) -> Result<()> {
        let state = SerialState {
            baud_divisor_low: state.divisor.0,
            baud_divisor_high: state.divisor.1,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line.0,
            line_status: state.line.1,
            modem_control: state.modem.0,
            modem_status: state.modem.1,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let line = Line(self.interrupt.clone());
        let (room, printer) = (Room(self.output.clone()), Printer(self.output.clone()));
        self.serial = Serial::from_state(&state, line, room, printer).map_err(|e| {
            Error::corrupt("the state of the serial port cannot be used").caused_by(e.to_string())
        })?;
        Ok(())
    }
}

impl PioDevice for SerialPort {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.serial.read(offset);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // Printing cannot fail, and an interrupt that cannot be raised has nobody to miss it.
            let _ = self.serial.write(offset, *byte);
        }
    }
}
