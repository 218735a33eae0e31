package remote

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Bounds of what is read into memory as a whole.
const (
	maxManifest = 4 << 20 // what the distribution specification lets registries refuse
	maxConfig   = 8 << 20 // of an image; real ones are some KiB
)

var (
	// ErrNotFound is in the error's chain when a repository, tag, manifest or blob is not there.
	ErrNotFound = errors.New("not found")

	// ErrNoRanges is in the error's chain when a server sends blobs as a whole only,
	// whatever range is asked for. Ranges that begin near a blob's beginning can still be had.
	ErrNoRanges = errors.New("the server ignores range requests")
)

// Options are how content is reached. The zero value is what most want.
type Options struct {
	// Keychain has the credentials of registries. Nil reads docker's configuration (or
	// podman's) and runs the credential helpers named there. It is asked when a registry
	// refuses an anonymous request, and again when it refuses what it accepted before.
	Keychain authn.Keychain
	// Transport sends the requests. Nil is one transport for the whole process, with one pool of
	// connections per registry, proxies from the environment, and timeouts.
	Transport http.RoundTripper
	// PlainHTTP speaks HTTP without TLS at once, also with public registries. False tries TLS
	// first, and never goes without for public names.
	PlainHTTP bool
	// Hosts is the folder with what containerd reads of registries, the config_path of its configuration
	// (also a list of folders, as there). HOST/hosts.toml in it names mirrors, certificates and headers, see
	// the package's doc. "" is none. It is read by [Open].
	Hosts string
	// Logger hears of retries, at level debug. Nil is silent.
	Logger *slog.Logger
}

// Source is where the content of one [Reference] lies. All methods may be called
// concurrently, but Close.
type Source interface {
	// Root returns the descriptor and the bytes of the manifest or index that the
	// reference names. The bytes have the descriptor's digest, which is the
	// reference's if it names one, and are not to be modified. A Source gives one answer for its
	// lifetime, also when a tag moves meanwhile.
	Root(ctx context.Context) (v1.Descriptor, []byte, error)

	// Manifest returns the manifest or index that desc names, which have its digest and, unless that is
	// negative, its size. The bytes are not to be modified.
	Manifest(ctx context.Context, desc v1.Descriptor) ([]byte, error)

	// Blob returns the blob that desc names. It does no I/O: that the blob is there and has
	// the size that desc claims shows when it is read.
	Blob(desc v1.Descriptor) Blob

	// Stats returns what was asked of the network until now; zero for local sources.
	Stats() Stats

	// Close lets go of files. Blobs of the Source cannot be read any more. Connections stay in the transport's pool.
	Close() error
}

// A Blob is a sequence of bytes of known length that is read by ranges.
type Blob interface {
	// Size is the blob's length in bytes, as its descriptor claims it.
	Size() int64

	// Range returns n bytes of the blob from offset off as a stream. The bytes are NOT
	// verified. The stream ends with io.EOF after exactly n bytes, with io.ErrUnexpectedEOF in
	// the error's chain if the other side ends it earlier, and with other errors when the
	// connection breaks or stalls; it is not retried. A range that is not within the blob is an error.
	// The caller closes the stream; ctx governs it until then.
	Range(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

// Stats counts what a [Source] asked of the network.
type Stats struct {
	// Requests that were sent: to the registry, its token server and object stores,
	// with retries and the hops of redirects.
	Requests int64
	// Bytes of response bodies that were received.
	Bytes int64
}

// Open returns the source of ref's content. For a registry it asks nobody yet, and reads what Options.Hosts has. A
// Layout's index and an Archive's members are read here; an archive in docker's old form, which has
// no digests, is read once as a whole to compute them.
func Open(ctx context.Context, ref Reference, opts Options) (Source, error) {
	switch ref.kind {
	case Registry:
		return openRegistry(ref, opts)
	case Layout:
		return openLayout(ctx, ref)
	case Archive:
		return openArchive(ctx, ref)
	}
	return nil, errors.New("no image was named")
}

// ReadBlob returns the whole blob that desc names, at most limit bytes, checked against
// desc's size and digest. A stream that breaks, and bytes that do not match, are asked for
// again: on the way from a registry a byte gets lost more often than in it.
func ReadBlob(ctx context.Context, src Source, desc v1.Descriptor, limit int64) ([]byte, error) {
	b, err := readBlob(ctx, src, desc, limit)
	if named, ok := src.(interface{ wrap(error) error }); ok {
		err = named.wrap(err)
	}
	return b, err
}

func readBlob(ctx context.Context, src Source, desc v1.Descriptor, limit int64) ([]byte, error) {
	if desc.Size < 0 || desc.Size > limit {
		return nil, fmt.Errorf("blob %v: its descriptor says %d bytes, of which at most %d are read", desc.Digest, desc.Size, limit)
	}
	tries, others := 3, 1
	if r, ok := src.(*registry); ok {
		others = len(r.endpoints)
		tries = max(tries, others+1)
	}
	for try := 1; ; try++ {
		rc, err := src.Blob(desc).Range(ctx, 0, desc.Size)
		if err != nil {
			return nil, err // Range has retried what can be retried
		}
		// The buffer grows with what arrives, not with what was claimed.
		var buf bytes.Buffer
		_, err = io.Copy(&buf, rc)
		rc.Close()
		if err == nil {
			if err = verify("blob", desc.Digest, buf.Bytes()); err == nil {
				return buf.Bytes(), nil
			}
			if stream, ok := rc.(*body); ok {
				stream.Distrust()
			}
			try = max(try, tries-others) // once more from each will do
		}
		if try == tries || ctx.Err() != nil {
			return nil, err
		}
	}
}

// checkRange reports whether [off, off+n) lies within size bytes.
func checkRange(digest v1.Hash, size, off, n int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("blob %v: no range of %d bytes at %d in %d bytes", digest, n, off, size)
	}
	return nil
}

// verify reports whether b has the digest want; what names the thing in the error.
func verify(what string, want v1.Hash, b []byte) error {
	if err := checkHash(want); err != nil {
		return fmt.Errorf("%s %v: %w", what, want, err)
	}
	if have := sum(b); have != want {
		return fmt.Errorf("%s %v: what came has the digest %v: it is damaged where it lies or on the way; try again, and if that does not help push the image again", what, want, have)
	}
	return nil
}

func sum(b []byte) v1.Hash {
	s := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s[:])}
}

// checkHash reports whether h is a SHA-256 digest, and so also whether it can stand in a path.
func checkHash(h v1.Hash) error {
	if b, err := hex.DecodeString(h.Hex); h.Algorithm != "sha256" || err != nil || len(b) != sha256.Size || hex.EncodeToString(b) != h.Hex {
		return fmt.Errorf("not a SHA-256 digest, and others are not supported")
	}
	return nil
}

// manifestType returns the media type of a manifest or index: what its bytes say, else hint, which is
// what the server or a descriptor says, else what its form is. Bytes that could be read as either are refused: two
// readers would run two different images of one digest (CVE-2021-41190).
func manifestType(b []byte, hint types.MediaType) (types.MediaType, error) {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return "", fmt.Errorf("not a manifest: %w", err)
	}
	if m.SchemaVersion == 1 {
		return "", errors.New("a manifest of schema 1, which registries gave up years ago: pull it and push it again with a current docker")
	}
	index, image := m.Manifests != nil, m.Config != nil || m.Layers != nil
	if index == image {
		return "", errors.New("not a manifest: it must have either manifests, or config and layers")
	}
	for _, t := range []types.MediaType{m.MediaType, hint} {
		if index && t.IsIndex() || image && t.IsImage() {
			return t, nil
		}
		if t == m.MediaType && t != "" {
			return "", fmt.Errorf("a manifest of type %.80q does not fit its content", t)
		}
	}
	if index {
		return types.OCIImageIndex, nil
	}
	return types.OCIManifestSchema1, nil
}
