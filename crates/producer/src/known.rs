//! Which queries need no job: their line is written already. What is left out is left out before
//! anything is looked up for it.

use shared::JobId;
use tokio::sync::oneshot;

/// Most ids that are asked about together.
pub const MAX_ASKED: usize = 1024;

/// Somebody who knows which ids have their line.
///
/// It is asked about each id once, in the order of the input, and about the next ones before it has
/// answered. Nothing but work depends on the answers: what is not known is published, and its outcome
/// dropped where it has a line.
pub trait Known: Send {
    /// Asks about `ids`, from 1 to [`MAX_ASKED`], without waiting: the answer says for each of them
    /// whether it has its line. An answer that never comes, or is too short, says no. It is waited for
    /// on a thread that may block.
    fn ask(&mut self, ids: &[&JobId]) -> oneshot::Receiver<Vec<bool>>;
}

/// Somebody in this process, who knows at once.
impl<F: FnMut(&JobId) -> bool + Send> Known for F {
    fn ask(&mut self, ids: &[&JobId]) -> oneshot::Receiver<Vec<bool>> {
        let (reply, answer) = oneshot::channel();
        // The other end is right here.
        let _sent = reply.send(ids.iter().map(|id| self(id)).collect());
        answer
    }
}
