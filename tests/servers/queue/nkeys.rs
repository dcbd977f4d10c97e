//! Nkeys, and the signed documents of operators, accounts and users, made by openssl for one test.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// Whose key it is: the first letter of its public form.
#[derive(Clone, Copy)]
pub(super) enum Owner {
    Operator = 14 << 3,
    Account = 0,
    User = 20 << 3,
}

/// A pair of keys.
pub(super) struct Nkey {
    dir: tempfile::TempDir,
    pub(super) seed: String,
    pub(super) public: String,
}

impl Nkey {
    pub(super) fn new(owner: Owner) -> Self {
        let dir = tempfile::tempdir().unwrap();
        openssl(dir.path(), "genpkey -algorithm ed25519 -outform DER -out key");
        openssl(dir.path(), "pkey -in key -inform DER -pubout -outform DER -out public");
        // The key itself is the end of the file.
        let key = |name: &str| {
            let file = std::fs::read(dir.path().join(name)).unwrap();
            file[file.len() - 32..].to_vec()
        };
        let prefix = owner as u8;
        let (seed, public) = (key("key"), key("public"));
        let seed = checked(&[18 << 3 | prefix >> 5, (prefix & 31) << 3], &seed);
        Self { seed, public: checked(&[prefix], &public), dir }
    }

    /// A document about `subject`, signed with this key.
    pub(super) fn sign(&self, name: &str, subject: &str, nats: &Value) -> String {
        let part = |value: &Value| base64(value.to_string().as_bytes());
        let head = part(&json!({ "typ": "JWT", "alg": "ed25519-nkey" }));
        let body = part(&json!({
            "jti": name, "iat": 1_700_000_000, "iss": self.public, "name": name,
            "sub": subject, "nats": nats,
        }));
        let text = format!("{head}.{body}");
        std::fs::write(self.dir.path().join("text"), &text).unwrap();
        openssl(
            self.dir.path(),
            "pkeyutl -sign -inkey key -keyform DER -rawin -in text -out signed",
        );
        let signature = std::fs::read(self.dir.path().join("signed")).unwrap();
        format!("{text}.{}", base64(&signature))
    }
}

pub(super) fn openssl(dir: &Path, arguments: &str) {
    let mut command = Command::new("openssl");
    let output = command.args(arguments.split(' ')).current_dir(dir).output();
    let output = output.expect("openssl is needed to make keys and certificates");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn checked(prefix: &[u8], key: &[u8]) -> String {
    let mut bytes = [prefix, key].concat();
    let sum = bytes.iter().fold(0_u16, |sum, &byte| {
        (0..8).fold(sum ^ u16::from(byte) << 8, |sum, _| {
            if sum & 0x8000 == 0 { sum << 1 } else { sum << 1 ^ 0x1021 }
        })
    });
    bytes.extend(sum.to_le_bytes());
    encode(&bytes, 5, b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
}

fn base64(bytes: &[u8]) -> String {
    encode(bytes, 6, b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
}

/// A letter for every so many bits, without padding.
fn encode(bytes: &[u8], bits: usize, letters: &[u8]) -> String {
    let bit = |at: usize| bytes.get(at / 8).map_or(0, |byte| usize::from(byte >> (7 - at % 8) & 1));
    let letter = |from: usize| (from..from + bits).fold(0, |value, at| value << 1 | bit(at));
    (0..bytes.len() * 8).step_by(bits).map(|from| char::from(letters[letter(from)])).collect()
}
