//! What other threads may ask of a session.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use format::Result;

use super::Shared;
use crate::proto::{BACKEND_CONFIG_CHANGE, feature};
use crate::socket;

/// A handle on a running session. Clones are equal; using one after the session ended does
/// nothing.
#[derive(Debug, Clone)]
pub struct SessionHandle(Arc<Shared>);

impl SessionHandle {
    pub(super) fn new(shared: Arc<Shared>) -> SessionHandle {
        SessionHandle(shared)
    }

    /// Ends the session at the next message boundary; [`super::Session::run`] drains the rings and
    /// returns.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::Release); // pairs with the load in `Session::serve`
        self.0.wake.signal();
    }

    /// Tells the front end that the configuration space changed, for example that the disk was
    /// resized; returns whether it offered a channel for that.
    ///
    /// # Errors
    /// `Busy` when the front end does not read the channel, `Io` when it closed it.
    pub fn config_changed(&self) -> Result<bool> {
        let channel = self.0.channel.lock().unwrap_or_else(PoisonError::into_inner);
        // Relaxed: the value came before the channel, under whose lock we are.
        let config = self.0.protocol.load(Ordering::Relaxed) & feature::CONFIG != 0;
        match &*channel {
            Some(channel) if config => {
                socket::send(channel.as_fd(), BACKEND_CONFIG_CHANGE, 0, &[], &[]).map(|()| true)
            }
            _ => Ok(false),
        }
    }
}
