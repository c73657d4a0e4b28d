//! A publisher's word on a model: an ed25519 signature over the model's id.
//!
//! The id is the hash of the manifest, which holds the hashes of all the model's bytes: who signs the id signs
//! every byte. What a key is worth is for whoever trusts it to know.

use std::{fmt, str::FromStr};

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use crate::{ModelId, Peer};

/// Separates these signatures from any other use of the key.
const DOMAIN: &[u8] = b"shoal model 1\0";
/// First word of the text form, with its version.
const HEAD: &str = "shoal-model-signature-1";
/// A longer text is none.
const TEXT_BYTES_MAX: usize = 512;

/// A signature of a publisher on a model, not checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSignature {
    /// The model.
    pub model: ModelId,
    /// Whose it is said to be.
    pub publisher: Peer,
    /// ed25519 over a domain and the 32 bytes of the model's id.
    pub signature: [u8; 64],
}

/// Why a signature is worth nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelSignatureError {
    /// Another text.
    #[error("that is no signature of a model: it begins with {HEAD} and has four words")]
    Text,
    /// Not made by this publisher for this model.
    #[error("the signature of {publisher} on model {model} is wrong")]
    Wrong {
        /// Whose it is said to be.
        publisher: Peer,
        /// On what.
        model: ModelId,
    },
}

impl ModelSignature {
    /// Signs a model with a publisher's secret key.
    pub fn sign(model: ModelId, secret: &[u8; 32]) -> ModelSignature {
        let key = SigningKey::from_bytes(secret);
        ModelSignature {
            model,
            publisher: Peer(key.verifying_key().to_bytes()),
            signature: key.sign(&signed_bytes(model)).to_bytes(),
        }
    }

    /// Whether the publisher made it for this model.
    ///
    /// # Errors
    /// It is of another key, of another model, or of nobody.
    pub fn verify(&self) -> Result<(), ModelSignatureError> {
        let wrong = || ModelSignatureError::Wrong {
            publisher: self.publisher,
            model: self.model,
        };
        let key = VerifyingKey::from_bytes(&self.publisher.0).map_err(|_| wrong())?;
        let signature = Signature::from_bytes(&self.signature);
        key.verify_strict(&signed_bytes(self.model), &signature)
            .map_err(|_| wrong())
    }
}

fn signed_bytes(model: ModelId) -> Vec<u8> {
    [DOMAIN, &model.0.0].concat()
}

/// `shoal-model-signature-1 <model> <publisher> <signature in base58>`.
impl fmt::Display for ModelSignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signature = bs58::encode(self.signature).into_string();
        write!(f, "{HEAD} {} {} {signature}", self.model, self.publisher)
    }
}

impl FromStr for ModelSignature {
    type Err = ModelSignatureError;

    fn from_str(text: &str) -> Result<Self, ModelSignatureError> {
        let wrong = ModelSignatureError::Text;
        if text.len() > TEXT_BYTES_MAX {
            return Err(wrong);
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        let [HEAD, model, publisher, signature] = words[..] else {
            return Err(wrong);
        };
        let mut bytes = [0; 64];
        let len = bs58::decode(signature).onto(&mut bytes[..]).unwrap_or(0);
        match (model.parse(), publisher.parse()) {
            (Ok(model), Ok(publisher)) if len == bytes.len() => Ok(ModelSignature {
                model,
                publisher,
                signature: bytes,
            }),
            _ => Err(wrong),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hash;

    #[test]
    fn a_signature_is_of_one_key_and_one_model() {
        let model = ModelId(Hash([7; 32]));
        let signed = ModelSignature::sign(model, &[1; 32]);
        assert_eq!(signed.publisher, Peer::of_secret(&[1; 32]));
        assert_eq!(signed.verify(), Ok(()));
        assert_eq!(signed.to_string().parse(), Ok(signed.clone()));
        let other_model = ModelSignature {
            model: ModelId(Hash([8; 32])),
            ..signed.clone()
        };
        let other_key = ModelSignature {
            publisher: Peer::of_secret(&[2; 32]),
            ..signed.clone()
        };
        let no_key = ModelSignature {
            publisher: Peer([0xff; 32]),
            ..signed.clone()
        };
        let mut flipped = signed.clone();
        flipped.signature[10] ^= 1;
        for wrong in [other_model, other_key, no_key, flipped] {
            assert!(wrong.verify().is_err(), "{wrong}");
        }
        let text = signed.to_string();
        for wrong in [
            "",
            "x",
            &text[1..],
            &text[..text.len() - 9],
            &format!("{text} more"),
            &"1".repeat(9999),
        ] {
            assert!(wrong.parse::<ModelSignature>().is_err(), "{wrong}");
        }
    }
}
