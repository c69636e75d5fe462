"""A signer's certificates as C2PA accepts them: a root, and a certificate that it has issued for signing."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["write_chain"]

_USES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
    "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def write_chain(folder: Path) -> tuple[Path, Path]:
    """Write certificates (the signer's, then the root) and the signer's key; beside them root.pem, which is self-signed."""
    root_key, key = generate_private_key(SECP256R1()), generate_private_key(SECP256R1())
    root_name, name = _name("Test root"), _name("Test signer")
    root = _signed(_builder(root_name, root_name, root_key, {"key_cert_sign", "crl_sign"}, is_root=True), root_key)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    builder = _builder(name, root_name, key, {"digital_signature"}, is_root=False)
    signer = _signed(builder.add_extension(usage, critical=False).add_extension(issuer, critical=False), root_key)
    certificates, key_file = folder / "chain.pem", folder / "key.pem"
    certificates.write_bytes(_pem(signer) + _pem(root))
    (folder / "root.pem").write_bytes(_pem(root))
    for path, each in ((key_file, key), (folder / "root_key.pem", root_key)):
        path.write_bytes(
            each.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return certificates, key_file


def _name(common_name: str) -> x509.Name:
    names = {NameOID.COMMON_NAME: common_name, NameOID.ORGANIZATION_NAME: "Tests"}
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in names.items()])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, uses: set[str], *, is_root: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{use: use in uses for use in _USES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _signed(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> x509.Certificate:
    return builder.sign(key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
