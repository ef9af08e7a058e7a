//! A network of a test's own, with tap interfaces, and the host's side of them.
//!
//! The network is that of the thread which asks for it, and of the processes that this thread
//! starts. It goes when the last of them has ended, and its interfaces with it: nothing is left on
//! the host, whatever happens to the test.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::mount::{have, run};
use crate::skip;

/// The type of frames that are a test's: one that is free for experiments.
pub const TYPE: u16 = 0x88b5;
/// Bytes of addresses and type.
pub const ETHERNET: usize = 14;

/// A network of this thread's own.
#[derive(Debug)]
pub struct Net(());

impl Net {
    /// A network with nothing in it; or none, and the test is counted as skipped.
    ///
    /// # Panics
    /// When the host does not give one although it should.
    #[must_use]
    pub fn new(test: &str) -> Option<Net> {
        if !rustix::process::geteuid().is_root() {
            skip(test, "interfaces are made as root");
            return None;
        }
        if !Path::new("/dev/net/tun").exists() {
            skip(test, "this machine has no /dev/net/tun");
            return None;
        }
        if !have(test, &["ip"]) {
            return None;
        }
        // SAFETY: changes what this thread sees of the network, and no memory.
        let alone = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(alone, 0, "a network of its own: {}", io::Error::last_os_error());
        Some(Net(()))
    }

    /// A tap interface that is up, and says nothing by itself.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn tap(&self, name: &str) {
        run("ip", &["tuntap", "add", "dev", name, "mode", "tap"]);
        run("ip", &["link", "set", "dev", name, "addrgenmode", "none", "mtu", "9000", "up"]);
    }

    /// Does something with an interface, by `ip link`.
    ///
    /// # Panics
    /// When that fails.
    pub fn link(&self, args: &[&str]) {
        run("ip", &[&["link"], args].concat());
    }

    /// Whether the host sees that somebody is at the other end of an interface.
    ///
    /// # Panics
    /// When there is no such interface.
    #[must_use]
    pub fn is_connected(&self, name: &str) -> bool {
        run("ip", &["link", "show", "dev", name]).contains("LOWER_UP")
    }

    /// The host's side of an interface.
    ///
    /// # Panics
    /// When there is no such interface.
    #[must_use]
    pub fn wire(&self, name: &str) -> Wire {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: makes a descriptor, which is owned here from then on.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, kind, i32::from(TYPE.to_be()));
            assert!(fd >= 0, "a packet socket: {}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        let text = CString::new(name).expect("a name");
        // SAFETY: reads a string that ends in a zero byte.
        let index = unsafe { libc::if_nametoindex(text.as_ptr()) };
        assert_ne!(index, 0, "there is no interface {name}");
        // SAFETY: all bits zero is a value of this plain structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).expect("a small number");
        address.sll_protocol = TYPE.to_be();
        address.sll_ifindex = i32::try_from(index).expect("a small number");
        let size = u32::try_from(size_of_val(&address)).expect("a small number");
        // SAFETY: the address lives until the call is over, and is as large as said.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
        assert_eq!(bound, 0, "{name}: {}", io::Error::last_os_error());
        Wire(socket)
    }
}

/// The host's side of an interface: frames of the type [`TYPE`] go in and come out.
#[derive(Debug)]
pub struct Wire(OwnedFd);

impl Wire {
    /// Sends a frame to the guest; false when the interface takes none.
    pub fn send(&self, frame: &[u8]) -> bool {
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        usize::try_from(sent) == Ok(frame.len())
    }

    /// The next frame from the guest, if one comes in time.
    ///
    /// # Panics
    /// When the host reports an error.
    #[must_use]
    pub fn receive(&self, time: Duration) -> Option<Vec<u8>> {
        let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
        let time = Timespec::try_from(time).expect("a short time");
        if poll(&mut fds, Some(&time)).expect("the host lets us wait") == 0 {
            return None;
        }
        let mut frame = vec![0; 1 << 17];
        // SAFETY: the buffer is valid for its length.
        let got =
            unsafe { libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        frame.truncate(usize::try_from(got).ok()?);
        Some(frame)
    }

    /// As [`Wire::receive`], for what must come soon.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn expect(&self, what: &str) -> Vec<u8> {
        self.receive(Duration::from_secs(20)).unwrap_or_else(|| panic!("no frame: {what}"))
    }
}

/// A frame of `len` bytes from and to given addresses, with a number and bytes that follow from it.
///
/// # Panics
/// For one that is too short for that.
#[must_use]
pub fn frame(to: [u8; 6], from: [u8; 6], number: u64, len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &TYPE.to_be_bytes(), &number.to_le_bytes()].concat();
    let low = number.to_le_bytes()[0];
    assert!(len >= frame.len());
    while frame.len() < len {
        frame.push(low ^ (frame.len() - ETHERNET).to_le_bytes()[0]);
    }
    frame
}
