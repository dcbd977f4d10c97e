#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write;

use super::*;

struct Place {
    dir: tempfile::TempDir,
    file: File,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("log")).unwrap();
        Self { dir, file }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// A follower that doesn't wait at all for more.
    fn follow(&self) -> Follow {
        Follow::new(self.path(), Some(Duration::ZERO), CancellationToken::new())
    }
}

fn read(tail: &mut Tail) -> String {
    let mut buffer = [0; 100];
    let num_bytes = tail.read(&mut buffer).unwrap();
    String::from_utf8(buffer[..num_bytes].to_vec()).unwrap()
}

fn ended(tail: &Tail) -> Option<End> {
    tail.ended.get().copied()
}

#[test]
fn an_end_stays_the_end_whatever_is_written_after_it() {
    let mut place = Place::new();
    let mut follow = place.follow();
    let mut tail = follow.next().unwrap();
    place.file.write_all(b"a").unwrap();
    assert_eq!(read(&mut tail), "a");
    assert_eq!((read(&mut tail).as_str(), ended(&tail)), ("", Some(End::Idle)));
    place.file.write_all(b"b").unwrap();
    assert_eq!(read(&mut tail), "");
    assert!(follow.next().is_none());
}

#[test]
fn the_old_file_is_read_to_its_end_before_the_new_one() {
    let mut place = Place::new();
    let mut follow = place.follow();
    let mut tail = follow.next().unwrap();
    std::fs::rename(place.path(), place.dir.path().join("old")).unwrap();
    std::fs::write(place.path(), "new").unwrap();
    place.file.write_all(b"rest").unwrap();
    assert_eq!(read(&mut tail), "rest");
    assert_eq!((read(&mut tail).as_str(), ended(&tail)), ("", Some(End::Replaced)));
    assert_eq!(read(&mut follow.next().unwrap()), "new");
}

#[test]
fn a_shorter_file_is_read_from_its_start() {
    let mut place = Place::new();
    let mut follow = place.follow();
    let mut tail = follow.next().unwrap();
    place.file.write_all(b"long").unwrap();
    assert_eq!(read(&mut tail), "long");
    std::fs::write(place.path(), "new").unwrap();
    assert_eq!((read(&mut tail).as_str(), ended(&tail)), ("", Some(End::Truncated)));
    assert_eq!(read(&mut follow.next().unwrap()), "new");
}

#[test]
fn a_wait_ends_with_the_cancellation() {
    let place = Place::new();
    let shutdown = CancellationToken::new();
    let mut follow = Follow::new(place.path(), None, shutdown.clone());
    let mut tail = follow.next().unwrap();
    let waiting = std::thread::spawn(move || {
        let text = read(&mut tail);
        (text, ended(&tail))
    });
    shutdown.cancel();
    assert_eq!(waiting.join().unwrap(), (String::new(), Some(End::Shutdown)));
    assert!(follow.next().is_none());
    assert!(is_cancelled_within(&shutdown, Duration::from_secs(3600)));
}
