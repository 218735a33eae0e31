package convert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"strconv"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"lazuli/fs/pack"
	"lazuli/fs/remote"
)

// PushPack puts a startup pack of size bytes beside the image, in the registry that ref names: as an artifact that refers to the image's
// manifest, which the repository's [pack.Tag] names from then on. Where the registry has no referrers API, it is added to the tag that stands in for it. It returns the artifact's digest.
func PushPack(ctx context.Context, ref remote.Reference, image *remote.Image, f io.ReaderAt, size int64, o remote.Options) (v1.Hash, error) {
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, 0, size)); err != nil {
		return v1.Hash{}, err
	}
	run, _, err := image.Config(ctx)
	if err != nil {
		return v1.Hash{}, err
	}
	d, err := newRegistryDest(ctx, ref, &Options{Remote: o})
	if err != nil {
		return v1.Hash{}, fmt.Errorf("push the startup pack of %v: %w", ref, err)
	}
	defer d.close()
	digest, err := d.putArtifact(ctx, artifact{
		subject: v1.Descriptor{MediaType: image.Manifest.MediaType, Size: int64(len(image.RawManifest)), Digest: image.Digest},
		blob:    v1.Descriptor{MediaType: pack.MediaType, Size: size, Digest: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}},
		notes: map[string]string{
			pack.MadeAnnotation:    time.Now().UTC().Format(time.RFC3339),
			pack.CommandAnnotation: pack.Command(run.Config.Entrypoint, run.Config.Cmd),
		},
		tag:  true,
		open: func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(f, 0, size)), nil },
	})
	if err != nil {
		return v1.Hash{}, fmt.Errorf("push the startup pack of %v: %w", ref, err)
	}
	return digest, nil
}

// An artifact is a startup pack as a registry has it.
type artifact struct {
	subject v1.Descriptor // the image's manifest
	blob    v1.Descriptor
	open    func() (io.ReadCloser, error)
	notes   map[string]string // annotations beside those that say where the blob is
	tag     bool              // it is the one that later builds begin with
}

// putArtifact brings a startup pack here, unless it is here, and returns the digest of its manifest.
func (d *registryDest) putArtifact(ctx context.Context, a artifact) (v1.Hash, error) {
	empty := []byte("{}")
	// Registries from before artifactType list the config's type in its place.
	config := v1.Descriptor{MediaType: pack.MediaType, Size: int64(len(empty)), Digest: hashOf(empty)}
	m := v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: pack.MediaType, Config: config, Layers: []v1.Descriptor{a.blob},
		Subject:     &a.subject,
		Annotations: maps.Clone(a.notes),
	}
	m.Annotations[pack.DigestAnnotation] = a.blob.Digest.String()
	m.Annotations[pack.SizeAnnotation] = strconv.FormatInt(a.blob.Size, 10)
	if m.Subject.MediaType == "" {
		m.Subject.MediaType = types.OCIManifestSchema1
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return v1.Hash{}, err
	}
	desc := v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: int64(len(raw)), Digest: hashOf(raw)}
	ref := d.ref.Context().Digest(desc.Digest.String())
	if have, err := d.pull.Head(ctx, ref); err == nil && have.Digest == desc.Digest {
		return desc.Digest, nil
	}
	if err := d.put(ctx, config, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(empty)), nil }); err != nil {
		return v1.Hash{}, err
	}
	if err := d.put(ctx, a.blob, a.open); err != nil {
		return v1.Hash{}, err
	}
	// Not putManifest, which does not know of referrers.
	if err := d.push.Push(ctx, ref, manifest{raw, desc.MediaType}); err != nil {
		return v1.Hash{}, err
	}
	if a.tag {
		if err := d.push.Put(ctx, d.ref.Context().Tag(pack.Tag), manifest{raw, desc.MediaType}); err != nil {
			return v1.Hash{}, err
		}
	}
	d.add(int64(len(raw)))
	return desc.Digest, nil
}

func hashOf(b []byte) v1.Hash {
	s := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s[:])}
}
