package convert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
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
	blob := v1.Descriptor{MediaType: pack.MediaType, Size: size, Digest: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}}
	run, _, err := image.Config(ctx)
	if err != nil {
		return v1.Hash{}, err
	}
	empty := []byte("{}")
	// Registries from before artifactType list the config's type in its place.
	config := v1.Descriptor{MediaType: pack.MediaType, Size: int64(len(empty)), Digest: hashOf(empty)}
	m := v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: pack.MediaType, Config: config, Layers: []v1.Descriptor{blob},
		Subject: &v1.Descriptor{MediaType: image.Manifest.MediaType, Size: int64(len(image.RawManifest)), Digest: image.Digest},
		Annotations: map[string]string{
			pack.DigestAnnotation: blob.Digest.String(), pack.SizeAnnotation: strconv.FormatInt(size, 10), pack.MadeAnnotation: time.Now().UTC().Format(time.RFC3339),
			pack.CommandAnnotation: pack.Command(run.Config.Entrypoint, run.Config.Cmd),
		},
	}
	if m.Subject.MediaType == "" {
		m.Subject.MediaType = types.OCIManifestSchema1
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return v1.Hash{}, err
	}
	desc := v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: int64(len(raw)), Digest: hashOf(raw)}
	d, err := newRegistryDest(ctx, ref, &Options{Remote: o})
	if err != nil {
		return v1.Hash{}, fmt.Errorf("push the startup pack of %v: %w", ref, err)
	}
	defer d.close()
	err = d.put(ctx, config, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(empty)), nil })
	if err == nil {
		err = d.put(ctx, blob, func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(f, 0, size)), nil })
	}
	if err == nil {
		// Not putManifest, which does not know of referrers.
		err = d.push.Push(ctx, d.ref.Context().Digest(desc.Digest.String()), manifest{raw, desc.MediaType})
	}
	if err == nil {
		err = d.push.Put(ctx, d.ref.Context().Tag(pack.Tag), manifest{raw, desc.MediaType})
	}
	if err != nil {
		return v1.Hash{}, fmt.Errorf("push the startup pack of %v: %w", ref, err)
	}
	return desc.Digest, nil
}

func hashOf(b []byte) v1.Hash {
	s := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s[:])}
}
