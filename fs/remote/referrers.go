package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"
)

// Referrers returns the artifacts of a type that say of themselves that they belong to the manifest with a digest, as the registry
// lists them: from its referrers API and, since many have none, from the tag that stands in for it, both asked side by side. Nothing
// but the digests of what they name can be relied on. A source that is not a registry has none.
//
// Source: OCI distribution specification 1.1, "Listing Referrers" and "Unavailable Referrers API".
func Referrers(ctx context.Context, src Source, digest v1.Hash, artifactType string) ([]v1.Descriptor, error) {
	r, ok := src.(*registry)
	if !ok {
		return nil, nil
	}
	if err := checkHash(digest); err != nil {
		return nil, r.wrap(fmt.Errorf("referrers of %.100q: %w", digest, err))
	}
	wants := []*want{
		{what: "referrers of " + digest.String(), path: "referrers/" + digest.String(), accept: string(types.OCIImageIndex), tag: true},
		{what: "tag for referrers of " + digest.String(), path: "manifests/sha256-" + digest.Hex, accept: string(types.OCIImageIndex), tag: true},
	}
	lists := make([][]v1.Descriptor, len(wants))
	var group errgroup.Group
	for i, w := range wants {
		group.Go(func() (err error) {
			lists[i], err = r.referrers(ctx, w)
			return err
		})
	}
	err := group.Wait()
	seen := map[v1.Hash]bool{}
	var found []v1.Descriptor
	for _, list := range lists {
		for _, d := range list {
			if d.ArtifactType == artifactType && !seen[d.Digest] && checkHash(d.Digest) == nil {
				seen[d.Digest] = true
				found = append(found, d)
			}
		}
	}
	if len(found) > 0 {
		err = nil
	}
	return found, r.wrap(err)
}

// Artifact returns the artifact of a type that a tag of the repository names, as a list of referrers would have it; the zero value if
// there is none. Nothing but the digests of what it names can be relied on.
func Artifact(ctx context.Context, src Source, tag, artifactType string) (v1.Descriptor, error) {
	r, ok := src.(*registry)
	if !ok {
		return v1.Descriptor{}, nil
	}
	var found v1.Descriptor
	w := &want{what: "artifact " + tag, path: "manifests/" + tag, accept: string(types.OCIManifestSchema1), tag: true}
	err := r.small(ctx, w, func(raw []byte, _ http.Header) error {
		var m struct {
			ArtifactType string            `json:"artifactType"`
			Annotations  map[string]string `json:"annotations"`
		}
		if err := json.Unmarshal(raw, &m); err != nil {
			return fmt.Errorf("%s: %w", w.what, err)
		}
		if m.ArtifactType == artifactType {
			found = v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: int64(len(raw)), Digest: sum(raw), ArtifactType: m.ArtifactType, Annotations: m.Annotations}
		}
		return nil
	})
	return found, r.wrap(r.none(ctx, w, err))
}

// referrers returns one of the lists. Registries that do not know of it say so in many ways, with a page for people too: what is neither
// an outage nor a matter of credentials means that there is none.
func (r *registry) referrers(ctx context.Context, w *want) ([]v1.Descriptor, error) {
	var list []v1.Descriptor
	err := r.small(ctx, w, func(raw []byte, _ http.Header) error {
		var index struct {
			Manifests []json.RawMessage `json:"manifests"`
		}
		if err := json.Unmarshal(raw, &index); err != nil {
			return fmt.Errorf("%s: %w", w.what, err)
		}
		list = nil
		for _, raw := range index.Manifests {
			var d v1.Descriptor
			if json.Unmarshal(raw, &d) == nil { // else somebody's with a digest of another kind
				list = append(list, d)
			}
		}
		return nil
	})
	return list, r.none(ctx, w, err)
}

// none takes an error for an answer, unless it is an outage or a matter of credentials.
func (r *registry) none(ctx context.Context, w *want, err error) error {
	var outage *transient
	var refused *denied
	if err == nil || ctx.Err() != nil || errors.As(err, &outage) || errors.As(err, &refused) {
		return err
	}
	r.log.Debug("no artifact", "what", w.what, "error", err)
	return nil
}
